"""The description of the interface, and the running server held against it."""
