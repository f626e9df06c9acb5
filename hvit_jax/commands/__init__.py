"""The command lines: flags made from typed records, and one thin file a command."""
