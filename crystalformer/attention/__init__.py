"""The sums: the public functions, the operators behind them and their reference."""
