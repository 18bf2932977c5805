"""Where a study's sites run: in this process (`local`), or on Flower's simulation runtime (`ray`)."""
