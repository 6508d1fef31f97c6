"""Numbers to codes and back: data types, granularity, scale rules, packing, errors. Pure functions on tensors."""
