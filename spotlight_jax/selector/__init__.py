"""Which cached tokens a query reads: hash functions of two forms, fitting, losses, scores, selection, files."""
