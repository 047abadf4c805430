"""English text of our own for calibration: prose, numbers, code, lists, questions."""

TEXT = """\
The river left the mountains at a place where three valleys met, and there, long before
anyone thought of writing down its name, people had built a bridge. It was a plain thing of
oak and stone. Carts crossed it in the morning with milk and onions, and crossed it again in
the evening with salt, nails, lamp oil and news. When the water rose in spring the planks
shook, and the ferryman, whose grandfather had opposed the bridge, stood on the bank and
said that he had always known it would not last.

It did last. Two hundred years later an engineer measured it and wrote a report of forty
pages. The arches, she found, carried about one third of what they could have carried; the
mortar was a mixture of lime, ash and ground brick in the proportion 2 : 1 : 1; the
foundations stood on gravel 3.4 metres below the bed. She recommended that nothing be
changed, and that the drains be cleaned every autumn. "A structure that has been left alone
by twelve generations," she wrote, "has usually been left alone for a reason."

Question: How deep below the river bed do the foundations stand?
Answer: They stand 3.4 metres below the bed, on gravel.

Some notes on keeping bees, taken from a letter. First, choose a place that has sun before
noon and shade after it. Second, give the colony more room than it needs, but not twice as
much. Third, write down the date of every visit: on 12 April the hive weighed 19.5 kg, on 3
May 24.1 kg, on 28 May 38.0 kg, and by the end of June more than 50 kg. Most of that gain
was honey from lime trees. The letter ends with a warning: never trust a warm day in March.
The bees fly out, the wind turns north, and in the evening there are fewer of them than
before.

def running_mean(values, width):
    '''Mean of the last `width` values at every position.'''
    total = 0.0
    means = []
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        means.append(total / min(index + 1, width))
    return means

The function above takes a list and a number. For the list [4, 8, 6, 2] and the width 2 it
returns [4.0, 6.0, 7.0, 4.0]: the first mean is over one value only, because there is
nothing before it.

A recipe for bread. Mix 500 g of flour, 340 g of water, 10 g of salt and 2 g of dry yeast.
Leave the dough for twelve hours at room temperature; it should double in size and smell a
little sour. Fold it four times, shape it, and let it rest for another hour. Heat the oven
to 240 degrees with an iron pot inside. Bake for 30 minutes with the lid on and 15 minutes
with the lid off. Do not cut the loaf while it is hot, however good it smells.

The museum has a register of everything that was ever given to it. Entry 1041 is a brass
telescope, received from a retired captain. Entry 1042 is a box of 64 glass slides, each
with the wing of an insect. Entry 1043 is a map of the harbour, scale 1 : 5000, drawn before
the lighthouse was built. Entry 1044 is the captain's second telescope, which he said he
would not need any longer either. The code of the cabinet is 7731. The code of the drawer is
2056. Visitors who want to see the map should ask for entry 1043; visitors who want to see
the slides should ask for entry 1042 and be patient, because the key is kept in another
building.

In mathematics one often meets a statement that is easy to check in each single case and
hard to prove in all. Take any positive whole number. If it is even, halve it; if it is odd,
multiply it by three and add one. Repeat. From 6 we get 3, 10, 5, 16, 8, 4, 2, 1. From 7 we
get 22, 11, 34, 17, 52, 26, 13, 40, 20, 10, 5, 16, 8, 4, 2, 1. Every number that anybody has
tried has arrived at 1 in the end, and nobody knows whether every number does.

Dear Ms Okafor, thank you for your message of Tuesday. We can confirm the order of 24 chairs
and 6 tables, delivery to the hall at 14 Mill Lane before 9 o'clock on Friday. The invoice
comes to 1,860 in total, of which you have paid 600. As agreed, the remaining 1,260 is due
within thirty days. Please tell the driver to use the side entrance, as the front door is
being painted. With kind regards, J. Lindqvist.

Question: How many chairs did Ms Okafor order, and what is still to be paid?
Answer: She ordered 24 chairs, and 1,260 is still to be paid.

Glaciers move, though not so that one could see it. A glacier is a river of ice: snow falls
on its upper part and is pressed, year after year, into ice; its own weight pushes that ice
downhill, and at the lower end it melts. Where snowfall and melting are equal the tongue of
the glacier stays where it is, although the ice in it is new every few centuries. A ladder
lost in a crevasse in 1788 came to light, in pieces, in 1832, four kilometres down the
valley. From such accidents the first good estimates of speed were made: some ninety metres
a year, or a quarter of a metre a day, or, for a patient observer with a fine scale, one
hundredth of a millimetre a second on the fastest days. Measurements from satellites have
since confirmed the order of magnitude.

The old clock in the waiting room was eleven minutes slow. Everybody who used the station
knew this and allowed for it; strangers missed their trains. One winter the clock was
repaired. For weeks afterwards the regular passengers arrived eleven minutes early, stood
about in the cold, and complained that one could rely on nothing any longer. In the end
somebody, nobody said who, set the clock back again.
"""
