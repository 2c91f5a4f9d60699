
    levels: of `make_levels`, plain decoding first. last: the controller of the generation before, None for the first.
    `begin` says whether the draft reads the prompts. A step goes: if `due`, the draft reads what it has missed and
    `read` is told; then the step is made with the tree of `level`, and `step` is told.
    """
