"""The colours of every figure."""

__all__ = ["COLORS"]

# Okabe and Ito's colours, told apart by colour-blind readers; their yellow is too pale for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
