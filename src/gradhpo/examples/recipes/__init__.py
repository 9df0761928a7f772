"""How a network of each library comes to gradhpo: `docs/your_model.md` shows the files."""
