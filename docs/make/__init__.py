"""Writers of the pages that are made from the code: ``python -m docs.make`` brings all of them up to date."""
