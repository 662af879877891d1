def sweep(quick):
    return {}
