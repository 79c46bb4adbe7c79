"""What a script that is run by its path imports first: until its `sentences`, Ctrl-C ends it at once and silently."""

from data import console

console.early()
