"""The model, and sampling text from it. A model is built from a recipe's [model] table and a vocabulary size; training
it, and writing and reading its weights, belong in training/ and runs/.
"""
