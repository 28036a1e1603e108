"""Masters become notebooks here: reading, generating, executing, scaffolding."""
