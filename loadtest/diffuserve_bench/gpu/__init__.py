"""`diffuserve bench gpu`: what a GPU can be measured for by one command, in phases."""
