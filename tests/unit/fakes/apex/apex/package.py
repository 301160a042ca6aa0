"""A stand-in for NVIDIA apex on the CPU: the public signatures that the engine calls, with plain torch behind them."""
