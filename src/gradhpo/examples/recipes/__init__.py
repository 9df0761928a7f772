"""How a network of each library comes to gradhpo: `docs/recipes.md` shows the files."""
