"""`tutelage selftest`: whether a pair of models teaches what it should, and how fast."""
