"""The bundled model family: a nested Python model, its independent draft, and the recipe that makes both."""
