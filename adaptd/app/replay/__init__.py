"""`adaptd replay`: from logs to a draft that is fitted to them, and an honest figure of what it gains."""
