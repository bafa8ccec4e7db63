"""What a turn runs on: sessions, their leases, their workspaces and their memory."""
