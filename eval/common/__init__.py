"""What evaluations share: flags, cases, the record of a run, names, pictures, metrics of texts."""
