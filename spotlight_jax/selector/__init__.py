"""Which cached tokens a query reads: hash functions in their forms, fitting, losses, scores, selection, files."""
