"""How the shipped models were trained: `tersor zoo train NAME`. Nothing here is needed to use them."""
