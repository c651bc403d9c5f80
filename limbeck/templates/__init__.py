"""What `limbeck new` copies: a method of each kind and its test, whole, working, checked as our code is.

`name_here` and `NameHere` become the new method's name and class.
"""
