"""Named mathematics that several methods share. It knows `core` and no method."""
