"""Wire formats: a body becomes a turn request, events become frames.  Pure; no Twisted here."""
