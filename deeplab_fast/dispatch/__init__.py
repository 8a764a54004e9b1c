"""How an op is declared, which implementation of it runs, and what each was shown to do where."""
