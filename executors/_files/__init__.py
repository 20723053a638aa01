"""Files that executors write and read: whole or not at all, checked, and refused in one line (docs/reliability.md)."""
