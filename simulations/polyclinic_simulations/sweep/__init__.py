"""`polyclinic sweep`: a study over a grid of methods, rules, partitions, severities, seeds; one page about it."""
