"""NF4 and its like: blockwise 4-bit weights, and the product with them."""
