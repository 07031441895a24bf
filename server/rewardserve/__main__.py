"""python -m rewardserve"""

from rewardserve.cli.main import main

main()
