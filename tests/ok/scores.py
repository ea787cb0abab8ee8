def brevity(completion, row):
    return 1 / len(completion)
