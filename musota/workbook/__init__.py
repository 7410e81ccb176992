"""What people see: records, tables, pictures, pages, widgets, the command line."""
