"""What an answer costs on this machine: measured in a fresh process, shown as a table and as one JSON line."""
