WORDS = {"so"}
