"""What `mygpt init` does: looks at a text, times the machine, predicts what models of several sizes would reach in a
given time, and writes the recipe of the best with its reasons. It trains nothing that is kept."""
