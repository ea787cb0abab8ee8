def brevity(completion):
    return 1 / len(completion)
