"""One module or folder per broker, found by URL scheme; see `driver.py` for what each supplies."""
