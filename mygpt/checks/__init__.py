"""What answers whether a run can be trusted: comparing two models bit for bit, running a recorded run or a failed step
again, trying out a launch. The checks compute and return what they find; cli prints it. What training itself needs to
refuse bad input belongs there and in processes/preflight.py.
"""
