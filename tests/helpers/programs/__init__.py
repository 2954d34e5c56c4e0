"""Random small programs: the text of a module's class, and what happens between its steps."""
