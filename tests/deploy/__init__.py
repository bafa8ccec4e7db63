"""What `deploy/` holds, with the programs that it is for."""
