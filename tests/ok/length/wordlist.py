WORDS = {"very", "really"}
