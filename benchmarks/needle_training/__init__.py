"""How the bundled needle model was trained and swept; not part of the wheel."""
