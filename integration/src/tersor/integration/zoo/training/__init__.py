"""How the shipped models were trained; each module runs with `python -m`. Nothing here is needed to use them."""
