"""`hvit demo`: try the methods on your own pictures in the browser."""
