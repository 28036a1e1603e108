"""Ground floor of the course library: the machine, the Triton interpreter, and measurement.

Nothing here knows a chapter, and nothing here asks for a device at import.
"""
