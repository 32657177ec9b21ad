"""The parts that every op is made of: registration, transforms, dropout, tuning, messages."""
