"""The pocket family: a tokenizer, a target and a draft small enough to ship, and the script that makes them."""
