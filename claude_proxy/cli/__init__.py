"""How the CLI is driven; nothing outside this package knows how it is spoken to."""
