"""`python -m hvit_jax`: the program `hvit`."""

from hvit_jax.commands.main import program

if __name__ == "__main__":
    program()
