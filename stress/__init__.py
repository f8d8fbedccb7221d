"""The stress program: scenarios that try to make the package fail, and a table of what happened."""
