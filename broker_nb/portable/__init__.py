"""Everything above the drivers that is written once: one call in flight, leases, settlement, looks, publishing."""
