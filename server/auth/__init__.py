"""Who is asking, and may they: tokens and the keys behind them, addresses behind proxies, limits."""
